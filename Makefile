# make run     execute the notebooks into runs/ (needs nothing but Python; the committed report is not touched);
#              with PARAMETERS="-p RUNS 1" and the like, which papermill knows, under other parameters
# make report  the same, then put notebooks, figures/ and checkpoints/ in place of the committed ones
# make test    run the tests
# make html    the committed report as HTML pages in runs/html/, for those without Jupyter
# make bench   compare with the textbook way, side by side
# make lint    ruff: style and format of notebooks and tests

PYTHON ?= python3
NOTEBOOKS ?= $(wildcard hw5_*.ipynb)
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check

# The progress bar is papermill's, one for each notebook, whose own are off where HW5_OUT is set. What the notebook prints
# stands behind it. It says nothing of the time to come, as cells take from nothing to many minutes.
BAR = TQDM_BAR_FORMAT="{desc} {bar:20} {n}/{total} cells, {elapsed}  "
EXECUTE = $(BAR) .venv/bin/papermill --log-level WARNING --progress-bar --no-log-output --stdout-file -

# What papermill notes in an executed notebook, times and paths, is not committed. Outputs are.
CLEAN = .venv/bin/nbstripout --keep-output --keep-count --keep-id \
	--extra-keys "metadata.papermill cell.metadata.papermill"

# Notebooks that have finished, with their data, parameters and checksum, until all that were asked for have: what a
# stopped or killed run leaves out.
FINISHED = $(OUT)/finished
THIS = "$$n $$HW5_DATA $(PARAMETERS) $$(cksum < $$n)"
TOOK = $$(sed -n 's/.*"seconds_total": \([0-9]*\).*/\1/p' figures/$${n%.ipynb}_metrics.json 2>&-)
ON = $$(sed -n 's/.*"device": "cuda.*/a GPU/p' figures/$${n%.ipynb}_metrics.json 2>&-)
IN = $$(sed -n 's/.*"training_precision": "\(.*\)".*/\1/p' figures/$${n%.ipynb}_metrics.json)

# Where a demo writes, which has not finished on the data.
DEMO = $(OUT)/demo/figures/$${n%.ipynb}_metrics.json

define execute
	@mkdir -p $(OUT); on="To go on, give the same command again."; demo=; \
	trap 'kill $$!; wait; echo "Stopped. $$on"; exit 130' INT TERM HUP; \
	for n in $(NOTEBOOKS); do \
		if grep -qsxF $(THIS) $(FINISHED); then echo "$$n had finished, and is left as it is."; continue; fi; \
		took=$(TOOK); on_gpu=$(ON); \
		echo "$$n$${took:+: took $$((took / 60)) minutes on $${on_gpu:-two CPU cores} when it was made, in $(IN)}."; \
		echo "While a model trains, which can take most of an hour, its bar stands still."; \
		rm -f $(DEMO); $(if $(1),rm -rf $(OUT)/figures $(OUT)/checkpoints;) \
		HW5_OUT=$(OUT) $(EXECUTE) $$n $(OUT)/$$n $(PARAMETERS) & wait $$! || { echo "$$n failed. $$on"; exit 1; }; \
		$(1) if [ "$$HW5_DATA" != demo ] && [ -e $(DEMO) ]; then demo="$$demo $$n"; else echo $(THIS) >> $(FINISHED); fi; \
	done; \
	if [ "$$demo" ]; then echo "A demo, for want of data:$$demo. $$on"; exit 0; fi; \
	grep -v $(NOTEBOOKS:%=-e '^% ') $(FINISHED) > $(FINISHED).part; mv $(FINISHED).part $(FINISHED)
endef

# To the report goes what was computed from the data.
define replace
grep -qs '"mode": "full"' $(OUT)/figures/$${n%.ipynb}_metrics.json \
	|| { echo "$$n: the data could not be had; a demo is not a report, so nothing was replaced."; exit 1; }; \
cp $(OUT)/figures/* figures/ && cp $(OUT)/checkpoints/* checkpoints/ || exit 1; \
$(CLEAN) $(OUT)/$$n && cp $(OUT)/$$n . || exit 1;
endef

.PHONY: run report test html bench lint

run: OUT = runs
run: .venv/installed
	$(call execute)
	@echo "The executed notebooks are in runs/, with their figures, those of a demo in runs/demo/."

report: OUT = runs/report
report: override PARAMETERS =
report: .venv/installed
	$(call execute,$(replace))

test: lint
	OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses=2 --dist=worksteal

html: .venv/installed
	.venv/bin/python tests/pages.py runs/html

bench: .venv/installed
	.venv/bin/python tests/bench.py

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/installed: requirements.txt tests/requirements.txt
	@echo "Setting up .venv: some minutes, most of them for torch (several gigabytes in its CUDA build)"
	@$(PYTHON) -m venv .venv
	@$(PIP) -r requirements.txt -r tests/requirements.txt
	@$(PIP) --no-deps sphinx-mathjax-offline  # MathJax; Sphinx is not needed
	@mkdir -p .venv/etc/ipython  # here a kernel looks: no warning of each about the way it talks to papermill
	@echo "c.IPKernelApp.log_level = 'CRITICAL'" > .venv/etc/ipython/ipython_kernel_config.py
	@touch $@
