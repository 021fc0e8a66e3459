-- The notebooks' cell titles become summaries that open and close the code; what a notebook keeps closed starts closed.
-- Of an output in several formats the plain one goes. Links between the files lead to the pages made from them.

local function titled(cell, code, title)
  local details = cell.attributes.jupyter and "<details>" or "<details open>"
  local summary = pandoc.write(pandoc.Pandoc(pandoc.Plain(title)), "html")
  code.text = code.text:gsub("^[^\n]*\n", "")
  details = pandoc.RawBlock("html", details .. "<summary>" .. summary .. "</summary>")
  return pandoc.Div({ details, code, pandoc.RawBlock("html", "</details>") })
end

function Div(cell)
  if cell.classes:includes("output") and #cell.content > 1 then
    cell.content:remove()
  end
  return cell:walk({
    CodeBlock = function(code)
      local title = code.text:match("^# @title ([^\n]*)")
      return title and titled(cell, code, title)
    end,
  })
end

function RawBlock(output)
  return output.format == "markdown" and pandoc.read(output.text, "markdown").blocks or nil
end

function Link(link)
  link.target = link.target:gsub("^([%w_]+)%.md", "%1.html"):gsub("^([%w_]+)%.ipynb", "%1.html")
  return link
end
