# Every target sets itself up: on a machine with Python 3.11 or newer, `make demo` and `make test` are all there is to type.
#
#   make demo    measure ten settings on the embedded model, write a report: three minutes on one core
#   make test    all tests and doctests             make test T="-k plan -x" passes options to pytest
#   make test-newest   a choice of them on the newest releases of everything; test-oldest: on the oldest that are supported
#   make lint    formatting, lint, types, and the floors of the house
#   make bench   the committed measurements of benchmarks/
#   make docs    check that the generated pages are fresh, build the site into site/
#   make pages   rewrite the generated pages and the tables in README.md
#   make lock    write lock/*.txt after a change of pyproject.toml; make lock L=--upgrade moves all to the newest releases
#   make clean   remove the environment and everything built

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
JOBS   ?= auto
T      ?=
L      ?=

PY       := $(VENV)/bin/python
INSTALL  := bin/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts
PIP      := $(VENV)/$(INSTALL)
LOCKED   := --no-deps --require-hashes -r
IN_PLACE := --no-deps --no-build-isolation -e .
UPGRADE  := $(INSTALL) --upgrade --upgrade-strategy eager

CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "fewer needs Python 3.11 or newer; say which with: make PYTHON=python3.12 ..." >&2; exit 1; }

.PHONY: demo test test-newest test-oldest lint format bench docs pages lock clean
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
	$(PY) scripts/lock.py --check
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
	$(PY) benchmarks/summaries.py --out benchmarks/results/summaries.json
	$(VENV)/bin/fewer bench --all --out runs/bench
	cp runs/bench/results.jsonl benchmarks/results/bench.jsonl
	$(VENV)/bin/fewer bench --all --model smollm2-135m --out runs/smollm2
	cp runs/smollm2/results.jsonl benchmarks/results/smollm2.jsonl
	$(VENV)/bin/fewer bench --all --model llava-scenes --out runs/llava-scenes
	cp runs/llava-scenes/results.jsonl benchmarks/results/llava_scenes.jsonl
	$(VENV)/bin/fewer bench --all --model bert-eras --out runs/bert-eras
	cp runs/bert-eras/results.jsonl benchmarks/results/bert_eras.jsonl
	$(VENV)/bin/fewer train minilm-r8 --out runs/minilm-r8
	$(VENV)/bin/fewer bench --all --model runs/minilm-r8 --data reuters-r8 --limit 500 --out runs/minilm
	sed 's|runs/minilm-r8|minilm-r8|g' runs/minilm/results.jsonl > benchmarks/results/minilm_r8.jsonl

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.docs
	$(PY) scripts/docs.py --check
	$(PY) scripts/tested_with.py --check
	$(PY) scripts/readme_table.py --check
	$(PY) -m mkdocs build --quiet --strict
	@echo "site: $(CURDIR)/site/index.html"

pages: $(VENV)/.base
	$(PY) scripts/docs.py
	$(PY) scripts/tested_with.py
	$(PY) scripts/readme_table.py

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest site build dist

# The environment grows in three steps, each with a stamp: what demo needs, what the tests add, what the site adds.
# Each is locked to the version and the hash (scripts/lock.py says how); a changed lock installs again. torch comes alone:
# a CPU build that is at hand is taken instead of a CUDA one, and all else that it needs is there already.
$(VENV)/.base: pyproject.toml lock/base.txt
	@$(CHECK_PYTHON)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(LOCKED) lock/base.txt
	$(PIP) "$(TORCH)"
	$(PIP) $(IN_PLACE)
	@touch $@

$(VENV)/.dev: $(VENV)/.base lock/dev.txt
	$(PIP) $(LOCKED) lock/dev.txt
	@touch $@

$(VENV)/.docs: $(VENV)/.base lock/docs.txt
	$(PIP) $(LOCKED) lock/docs.txt
	@touch $@

# The two other ends, each in an environment of its own. What runs there stands in pyproject.toml, under `newest`.
test-newest test-oldest: export OMP_NUM_THREADS = 1
test-newest test-oldest: export HF_HUB_OFFLINE = 1

# timm without its dependencies: it would bring torchvision, which is not needed and has no CPU build to match.
test-newest:
	@$(CHECK_PYTHON)
	test -x $(VENV)-newest/bin/python || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/$(UPGRADE) "$(TORCH)" -e ".[report,assets,test]"
	$(VENV)-newest/$(UPGRADE) --no-deps timm
	@echo "against the lock:"
	@$(VENV)-newest/bin/python scripts/lock.py --differences
	$(VENV)-newest/bin/python -m pytest -n $(JOBS) -m newest $(T)

test-oldest: $(VENV)-oldest/.base
	$(VENV)-oldest/bin/python -m pytest -n $(JOBS) -m newest $(T)

$(VENV)-oldest/.base: pyproject.toml lock/oldest.txt
	@$(CHECK_PYTHON)
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/$(INSTALL) $(LOCKED) lock/oldest.txt
	$(VENV)-oldest/$(INSTALL) "$(TORCH)"
	$(VENV)-oldest/$(INSTALL) $(IN_PLACE)
	@touch $@

# uv, newest, in a throw-away environment: only making the lock needs it.
lock:
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear build/lock
	build/lock/$(INSTALL) uv
	build/lock/bin/python scripts/lock.py $(L)
	build/lock/bin/python scripts/tested_with.py
