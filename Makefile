PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL ?= $(BIN)/python -m pip install --quiet
# Every installed file has a hash in the requirements. Packages without wheels are built with the pinned setuptools, since pip does not
# check the hashes of build dependencies that it fetches.
PINNED := $(INSTALL) --require-hashes --no-build-isolation
UV ?= uv
PINS := requirements-build.txt requirements.txt requirements-docs.txt requirements-gpu-compiler.txt requirements-parity.txt

.PHONY: demo test lint docs parity gpu-compiler pods pins campaign clean

# Shows which tokens a model trains on, and the effect; `make demo QUICK=1` is shorter.
demo: $(VENV)/.installed
	$(BIN)/python -m slm_jax experiment $(if $(QUICK),demo_quick,demo) --results=runs

test: lint
	$(BIN)/pytest -n 4 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# The site, into build/site: a dead link, a missing page or a docstring that names an unknown argument is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html"

$(VENV)/.docs: $(VENV)/.installed requirements-docs.txt
	$(PINNED) -r requirements.txt -r requirements-docs.txt
	@touch $@

# PyTorch, transformers, reasoning-gym: with them `make test` compares models, vocabularies and scores with Hugging Face's too,
# and the tasks of reasoning-gym are tested.
parity: $(VENV)/.parity

$(VENV)/.parity: $(VENV)/.installed requirements-parity.txt requirements-torch-cpu.txt
	$(PINNED) -r requirements.txt -r requirements-parity.txt -r requirements-torch-cpu.txt
	@touch $@

# JAX's compiler for GPUs without what only a GPU would run: with it `make test` compiles steps for GPUs, on any machine.
# On a GPU install the extra `gpu`; where only this is, JAX complains of what is missing unless JAX_PLATFORMS=cpu.
gpu-compiler: $(VENV)/.gpu-compiler

$(VENV)/.gpu-compiler: $(VENV)/.installed requirements-gpu-compiler.txt
	$(PINNED) --no-deps -r requirements-gpu-compiler.txt
	@touch $@

# The steps of the pods' run files, compiled for the chips that they name; some minutes a file on two cores.
COMPILE := $(BIN)/python -m slm_jax compile
pods: $(VENV)/.installed
	$(BIN)/pytest -m pods
	$(COMPILE) --topology=v5e:4x4 --gin_file=configs/runs/rho1/math_1b/selective.gin --output=runs/pods/math_1b.json
	$(COMPILE) --topology=v5p:2x4x4 --gin_file=configs/runs/rho1/weak_to_strong/selective.gin --output=runs/pods/weak_to_strong.json
	$(COMPILE) --topology=v5e:8x8 --gin_file=configs/runs/meco/1_6b/meco.gin --output=runs/pods/meco.json

$(VENV)/.installed: pyproject.toml requirements-build.txt requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "slm_jax needs Python 3.11 or newer; name one with: make PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV); the first time takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --require-hashes -r requirements-build.txt
	$(PINNED) -r requirements.txt
	$(INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

# Faults and hostile inputs by the hundred, some 20 minutes on two cores; its table goes into docs/reliability.md.
SEED ?= 1
campaign: $(VENV)/.installed
	rm -f build/campaign.json
	$(BIN)/python tests/campaign.py --seed=$(SEED) --page

# Writes the hashes of all files of the pinned versions, for every platform; the old ones are dropped first. Needs uv.
pins:
	for file in $(PINS); do \
		sed -i.old '/^    --hash=/d; /^#/d; s/ *\\$$//' $$file && rm $$file.old && \
		dependencies=$$(test $$file = requirements.txt || echo --no-deps) && \
		UV_CUSTOM_COMPILE_COMMAND="make pins" UV_FIND_LINKS= $(UV) pip compile --quiet --universal $$dependencies --upgrade \
			--no-strip-extras --generate-hashes --no-annotate --python-version 3.11.5 $$file -o $$file || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
