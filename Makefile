# `make help` lists the targets. Everything runs in .venv, which the first call builds.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup setup-vbench figures data report study study-full test lint lab bench bench-probe bench-model bench-train bench-vbench bench-gpu clean
BIN := .venv/bin

# One BLAS thread a process: several processes share the cores, threads on top only wait.
export OPENBLAS_NUM_THREADS ?= 1
export OMP_NUM_THREADS ?= 1

IN_RANGE = 'import sys; sys.exit(not $(1) <= 100 * sys.version_info[0] + sys.version_info[1] <= $(2))'
COMMA := ,
# $(call set_up,SCRIPT,FIRST,LAST,NAMES,IN WORDS,TARGET): SCRIPT by the first Python in range.
set_up = @py='$(PYTHON)'; if [ -n "$$py" ]; then exact=--exact; else \
	for p in $(4) python3 python; do if "$$p" -c $(call IN_RANGE,$(2),$(3)) 2>/dev/null; then py=$$p; break; fi; done; fi; \
	if [ -z "$$py" ]; then echo "No Python $(5) was found: install one, or name it by 'make $(6) PYTHON=/path/to/python3.11'." >&2; exit 1; fi; \
	if ! "$$py" -c $(call IN_RANGE,$(2),$(3)) 2>/dev/null; then echo "$$py is no Python $(5): name one by 'make $(6) PYTHON=/path/to/python3.11'." >&2; exit 1; fi; \
	"$$py" $(1) $$exact

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' Makefile | awk -F '\t' '{ printf "make %-12s %s\n", $$1, $$2 }'

setup: ## build .venv from constraints.txt (PYTHON=... chooses the interpreter)
	$(call set_up,tools/setup_env.py,311,313,python3.11 python3.12 python3.13,3.11$(COMMA) 3.12 or 3.13,setup)

setup-vbench: ## build .venv-vbench, where VBench runs with its own libraries (6 GB, a minute or more)
	$(call set_up,tools/setup_vbench.py $(if $(INTO),--into '$(INTO)'),310,311,python3.11 python3.10,3.11 or 3.10,setup-vbench)

# RUNS names folders with spaces or commas between them; the parameter takes commas.
EMPTY :=
GIVEN = $(strip $(PARAMS) $(if $(SERIES),series='$(SERIES)') $(if $(VIDEOS),videos='$(VIDEOS)') \
	$(if $(RUNS),runs='$(subst $(EMPTY) ,$(COMMA),$(strip $(RUNS)))'))
figures: setup ## draw what is stale (FIG=fig1 FORCE=1 LIST=1 PARAMS='a=1 b=2' VIDEOS=DIR RUNS='OUT1 OUT2')
	@$(BIN)/mla-study figures $(if $(FIG),--fig $(FIG)) $(if $(GIVEN),--params $(GIVEN)) $(if $(FORCE),--force) $(if $(LIST),--list)

data: setup ## measure the committed tables of results/data anew (FIG=fig1 for one figure's)
	@$(BIN)/mla-study data $(if $(FIG),--fig $(FIG))

report: setup ## one page of every claim, its number, null and verdict (RESULTS=DIR adds your own)
	@$(BIN)/mla-study report $(if $(RESULTS),--results '$(RESULTS)') $(ARGS)

study: setup ## train and judge four students of the miniature, in minutes (again goes on)
	@$(BIN)/mla-study study mini $(ARGS)

study-full: setup ## all inits, three seeds, sweeps, long rollouts, into results/data (hours; again goes on)
	@$(BIN)/mla-study study full --out results/data $(ARGS)

test: setup ## run the tests (ARGS='-k name' goes to pytest)
	@$(BIN)/python -m pytest -q -n 2 $(ARGS)

lint: setup ## ruff, pyright, and notebooks without outputs
	@$(BIN)/ruff check . && $(BIN)/pyright && $(BIN)/nbstripout --keep-id --verify $(wildcard notebooks/*.ipynb)

lab: setup ## open JupyterLab on the kernel that the figures use
	@JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS) notebooks

bench-probe: setup ## compare rank-probe's speed with its floor and with WeightWatcher
	@$(BIN)/mla-study bench-probe $(ARGS)

bench-model: setup ## measure the model against diffusers and dense masks, its memory and long rollouts
	@$(BIN)/mla-study bench-model $(ARGS)

bench-train: setup ## measure training: latent/dense, DMD, tracker, rendering, two processes (ARGS=--quick)
	@$(BIN)/mla-study bench train $(ARGS)

bench-vbench: setup setup-vbench ## measure VBench through workers: overhead, two workers, a second run (ARGS=--quick)
	@$(BIN)/mla-study bench vbench $(ARGS)

bench: setup ## measure the efficiency study on this CPU anew (half an hour, one thread)
	@$(BIN)/mla-study calibrate
	@$(BIN)/mla-study bench attention
	@$(BIN)/mla-study bench memory
	@$(BIN)/mla-study bench batch
	@$(BIN)/mla-study data --fig fig_attribution

bench-gpu: setup ## measure Wan 1.3B on a CUDA GPU, piece by piece (again goes on; ARGS='--pieces step')
	@$(BIN)/mla-study bench gpu $(ARGS)

clean: ## remove .venv, .venv-vbench, drawn figures, the report and caches; committed results stay
	@rm -rf .venv .venv-vbench results/figures results/report .pytest_cache .ruff_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
