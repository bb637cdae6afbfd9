# Everything a fresh Debian machine with Python 3.11 and make needs, in two commands:
#   make run    a proxy with one key store and one key, on https://localhost:8443
#   make test   linters and all tests
#   make dashboards   grafana/dashboards anew, after a change in grafana/source
#   make pictures     the pictures of the dashboards in docs/images, from a run with planted failures
#   make references   the tables of docs/configuration.md, docs/commands.md and docs/metrics.md anew
#   make docs   the documentation as a site, in site/
#   make deb    the Debian package, dist/xkiproxy_VERSION_ARCH.deb
#   make lock   deploy/*requirements.txt anew: the newest dependencies, by their hashes
#   make sbom   dist/xkiproxy.cdx.json, a CycloneDX bill of materials of these
#   make bench  the benchmark with its targets; make bench-quick in a minute
# The tests hold the hot path to its budget of instructions; `make gate` shows the table alone.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SBOM   ?= dist/xkiproxy.cdx.json
DEMO   ?= run/demo

.PHONY: run test lint dashboards pictures references docs deb lock sbom bench bench-quick gate system-packages clean

run: $(BIN)/.installed
	@test -e $(DEMO)/xkiproxy.toml || $(BIN)/xkiproxy init $(DEMO)
	@$(BIN)/xkiproxy kms-config --config $(DEMO)/xkiproxy.toml
	@$(BIN)/xkiproxy serve --config $(DEMO)/xkiproxy.toml

test: system-packages $(BIN)/.installed-test lint
	$(BIN)/pytest -q -n auto

lint: $(BIN)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dashboards: $(BIN)/.installed-test
	$(BIN)/python -m grafana.source

pictures: system-packages $(BIN)/.installed-test
	$(BIN)/python -m grafana.demonstration docs/images

references: $(BIN)/.installed
	$(BIN)/python -m website

docs: $(BIN)/.installed-docs
	$(BIN)/python -m website.build

deb:
	@tests/system-packages.sh deb
	@deploy/debian/build

lock: $(BIN)/.installed-release
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	    --no-annotate --custom-compile-command "make lock" --extra tracing \
	    --output-file deploy/requirements.txt pyproject.toml
	@echo 'setuptools>=77' | $(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 \
	    --generate-hashes --no-annotate --custom-compile-command "make lock" \
	    --output-file deploy/build-requirements.txt -

# Of an environment of its own: this one has what tests and benchmarks need too. The tool does not
# look for a version outside of pyproject.toml.
sbom: $(BIN)/.installed-release
	@mkdir -p "$(dir $(SBOM))" && place=$$(mktemp -d) && trap 'rm -rf "$$place"' EXIT && \
	$(PYTHON) -m venv "$$place" && \
	"$$place/bin/pip" install --quiet --require-hashes --requirement deploy/requirements.txt && \
	"$$place/bin/pip" uninstall --quiet --yes pip setuptools && \
	version=$$(sed -n 's/^__version__ = //p' xkiproxy/__init__.py) && \
	sed "s/^dynamic = .*/version = $$version/" pyproject.toml > "$$place/pyproject.toml" && \
	$(BIN)/cyclonedx-py environment --pyproject "$$place/pyproject.toml" --output-reproducible \
	    --output-file "$(SBOM)" "$$place/bin/python" && echo "made $(SBOM)"

bench: system-packages $(BIN)/.installed-bench
	$(BIN)/xkiproxy-bench run --output run/bench/results.json --plots run/bench

bench-quick: system-packages $(BIN)/.installed-bench
	$(BIN)/xkiproxy-bench run --quick --output run/bench/quick.json

gate: system-packages $(BIN)/.installed-test
	$(BIN)/python -m benchmarks.instructions

system-packages:
	@tests/system-packages.sh

$(BIN)/pip:
	@# One that fails (no python3-venv) leaves a python without pip behind.
	@test -e $(VENV) && there=yes || there=; \
	$(PYTHON) -m venv $(VENV) || { test -n "$$there" || rm -rf $(VENV); exit 1; }

$(BIN)/.installed: $(BIN)/pip pyproject.toml
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(BIN)/.installed-test: $(BIN)/pip pyproject.toml
	$(BIN)/pip install --quiet --editable '.[test,release]'
	@touch $@ $(BIN)/.installed $(BIN)/.installed-release

$(BIN)/.installed-docs: $(BIN)/pip pyproject.toml
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@ $(BIN)/.installed

$(BIN)/.installed-bench: $(BIN)/pip pyproject.toml
	$(BIN)/pip install --quiet --editable '.[bench]'
	@touch $@ $(BIN)/.installed

$(BIN)/.installed-release: $(BIN)/pip pyproject.toml
	$(BIN)/pip install --quiet --editable '.[release]'
	@touch $@ $(BIN)/.installed

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
