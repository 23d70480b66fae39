# Each target sets up what it needs in .venv, from nothing.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: quickstart quickstart-dense test test-slow lint browser docs package lowest clean

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch and torchvision come in one step, so that they fit each other
.venv/.train: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --progress-bar off torch torchvision -e '.[train,detect]'
	touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --progress-bar off torch torchvision -e '.[dev]'
	touch $@ .venv/.train

# Generated scenes to a trained network, its accuracy, and pictures of its slots. Offline, some minutes on 2 cores.
quickstart: .venv/.train
	PATH="$(CURDIR)/$(BIN):$$PATH" ./scripts/quickstart.sh

# The same for a detector and a segmenter.
quickstart-dense: .venv/.train
	PATH="$(CURDIR)/$(BIN):$$PATH" ./scripts/quickstart_dense.sh

# two processes, with a thread each, take half the time of one with two
test: .venv/.dev lint browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --durations=15

# the page of slots is tested in a real browser; where it cannot be installed, that test says that it was skipped
browser:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromedriver >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; fi

# what takes longer than the whole of `make test`
test-slow: .venv/.dev
	$(BIN)/pytest -m slow --durations=0

# the site, in site/; tests build it too, into a folder of their own
docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# wheel and sdist in dist/, checked, and the wheel tried in an environment of its own
package: .venv/.dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/python scripts/check_package.py dist --install

# the tests of networks, weights and data with the lowest versions that pyproject.toml states
lowest:
	$(PYTHON) scripts/lowest.py .venv-lowest

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-lowest .cache quickstart quickstart-dense site dist
