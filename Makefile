# make run     execute the notebooks into runs/ (needs nothing but Python; the committed report is not touched)
# make report  the same, then put notebooks, figures/ and checkpoints/ in place of the committed ones
# make test    run the tests
# make html    the committed report as HTML pages in runs/html/, for those without Jupyter
# make bench   compare with the textbook way, side by side
# make lint    ruff: style and format of notebooks and tests

PYTHON ?= python3
NOTEBOOKS ?= $(wildcard hw5_*.ipynb)
# Progress bars are for people at a notebook. A saved notebook keeps the log lines instead.
EXECUTE = TQDM_DISABLE=1 .venv/bin/papermill --no-progress-bar --log-output

# What papermill notes in an executed notebook, times and paths, is not committed. Outputs are.
CLEAN = .venv/bin/nbstripout --keep-output --keep-count --keep-id \
	--extra-keys "metadata.papermill cell.metadata.papermill"

# Ctrl-C, answered in a line: what to type to go on without the notebooks that are done.
STOPPABLE = left="$(NOTEBOOKS)"; \
	trap 'echo "Stopped. Finished epochs are kept. To go on: make $@ NOTEBOOKS=\"$$left\""; exit 130' INT
DONE = left="$${left\#$$n}"; left="$${left\# }"

.PHONY: run report test html bench lint

run: .venv/installed
	@mkdir -p runs
	@$(STOPPABLE); for n in $(NOTEBOOKS); do HW5_OUT=runs $(EXECUTE) $$n runs/$$n || exit 1; $(DONE); done
	@echo "The executed notebooks and their figures are in runs/."

report: .venv/installed
	@mkdir -p runs/report figures checkpoints
	@$(STOPPABLE); for n in $(NOTEBOOKS); do \
		HW5_OUT=runs/report $(EXECUTE) $$n runs/report/$$n || exit 1; \
		grep -qs '"mode": "full"' runs/report/figures/$${n%.ipynb}_metrics.json \
			|| { echo "$$n: the data could not be had; a demo is not a report, so nothing was replaced."; exit 1; }; \
		cp runs/report/figures/* figures/ && cp runs/report/checkpoints/* checkpoints/ || exit 1; \
		$(CLEAN) runs/report/$$n && cp runs/report/$$n . || exit 1; \
		$(DONE); \
	done

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses=2 --dist=loadgroup

html: .venv/installed
	.venv/bin/python tests/pages.py runs/html

bench: .venv/installed
	.venv/bin/python tests/bench.py

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/installed: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt -r tests/requirements.txt
	.venv/bin/python -m pip install --quiet --no-deps sphinx-mathjax-offline  # MathJax; Sphinx is not needed
	@touch $@
