# Every target sets itself up: on a machine with Python 3.11 or newer, `make demo` and `make test` are all there is to type.
#
#   make demo    measure the embedded model with every method, write a report
#   make test    all tests and doctests             make test T="-k plan -x" passes options to pytest
#   make lint    formatting, lint, types, and the floors of the house
#   make bench   the committed measurements of benchmarks/
#   make docs    check that the generated pages are fresh, build the site into site/
#   make pages   rewrite the generated pages and the tables in README.md
#   make clean   remove the environment and everything built

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
JOBS   ?= auto
T      ?=

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint format bench docs pages clean
.DELETE_ON_ERROR:

demo: $(VENV)/.base
	$(VENV)/bin/fewer bench --out runs/demo
	@echo "report: $(CURDIR)/runs/demo/report.html"

# One thread per test process: the tests are many and small.
test: export OMP_NUM_THREADS = 1
test: export HF_HUB_OFFLINE = 1
test: $(VENV)/.dev
	$(PY) -m pytest -n $(JOBS) $(T)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.base
	$(PY) benchmarks/import_time.py
	$(PY) benchmarks/memory.py
	$(PY) benchmarks/vision_speed.py --shape deit-s vit-b --batch 8 64 --out benchmarks/results/vision_speed.json
	$(PY) benchmarks/vision_speed.py --settings others --out benchmarks/results/vision_speed.json
	$(PY) benchmarks/vision_speed.py --settings ragged --batch 32 --execution packed --out benchmarks/results/vision_speed.json
	$(PY) benchmarks/kv_speed.py --context 4096 --layers 4 --rounds 3 --steps 64
	$(PY) benchmarks/visual_speed.py --rows 576 --tokens 64 --rounds 4 --out benchmarks/results/visual_speed.json
	$(PY) benchmarks/visual_speed.py --rows 576 --tokens 64 --rounds 3 --shape 360m \
		--out benchmarks/results/visual_speed_360m.json
	$(PY) benchmarks/visual_speed.py --rows 2916 --tokens 64 --rounds 1 --methods divprune:tokens=64 \
		cdpruner:tokens=64 --out benchmarks/results/visual_speed_2916.json
	$(PY) benchmarks/prefill_speed.py --context 4096 --layers 6 --rounds 3 --out benchmarks/results/prefill_speed.json
	$(VENV)/bin/fewer bench --out runs/bench
	cp runs/bench/results.jsonl benchmarks/results/bench.jsonl
	$(VENV)/bin/fewer bench --model smollm2-135m --out runs/smollm2
	cp runs/smollm2/results.jsonl benchmarks/results/smollm2.jsonl
	$(VENV)/bin/fewer bench --model llava-scenes --out runs/llava-scenes
	cp runs/llava-scenes/results.jsonl benchmarks/results/llava_scenes.jsonl
	$(VENV)/bin/fewer bench --model bert-eras --out runs/bert-eras
	cp runs/bert-eras/results.jsonl benchmarks/results/bert_eras.jsonl
	$(VENV)/bin/fewer train minilm-r8 --out runs/minilm-r8
	$(VENV)/bin/fewer bench --model runs/minilm-r8 --data reuters-r8 --limit 500 --out runs/minilm
	sed 's|runs/minilm-r8|minilm-r8|g' runs/minilm/results.jsonl > benchmarks/results/minilm_r8.jsonl

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.docs
	$(PY) scripts/docs.py --check
	$(PY) scripts/readme_table.py --check
	$(PY) -m mkdocs build --quiet --strict
	@echo "site: $(CURDIR)/site/index.html"

pages: $(VENV)/.base
	$(PY) scripts/docs.py
	$(PY) scripts/readme_table.py

clean:
	rm -rf $(VENV) site build dist

# The environment grows in three steps, each with a stamp: what demo needs, what the tests add, what the site adds.
# torch comes first and alone, so that a CPU build that is already at hand is taken instead of a CUDA one.
$(VENV)/.base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "fewer needs Python 3.11 or newer; say which with: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) -e ".[report]"
	@touch $@

# timm without its dependencies: it would bring torchvision, which is not needed and has no CPU build to match.
$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e ".[test,lint]"
	$(PIP) --no-deps "timm>=1.0.20"
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -e ".[docs]"
	@touch $@
