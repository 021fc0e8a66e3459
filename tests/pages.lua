-- The notebooks' cell titles become summaries that open and close the code; what a notebook keeps closed starts closed.
-- Links between the files lead to the pages made from them, and the first heading is the page's title.

local function rendered(name)
  return name:gsub("^([%w_]+)%.md", "%1.html"):gsub("^([%w_]+)%.ipynb", "%1.html")
end

function Div(cell)
  for i, block in ipairs(cell.content) do
    local title = block.t == "CodeBlock" and block.text:match("^# @title ([^\n]*)")
    if title then
      local details = cell.attributes.jupyter and "<details>" or "<details open>"
      local summary = pandoc.write(pandoc.Pandoc(pandoc.Plain(title)), "html")
      block.text = block.text:gsub("^[^\n]*\n", "")
      cell.content[i] = pandoc.Div({
        pandoc.RawBlock("html", details .. "<summary>" .. summary .. "</summary>"),
        block,
        pandoc.RawBlock("html", "</details>"),
      })
    end
  end
  return cell
end

function Link(link)
  link.target = rendered(link.target)
  return link
end

function Pandoc(document)
  document:walk({
    Header = function(header)
      document.meta.pagetitle = document.meta.pagetitle or pandoc.utils.stringify(header)
    end,
  })
  return document
end
