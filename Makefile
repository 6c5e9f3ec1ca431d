# Every target sets up what it needs in .venv and needs nothing but Python (data also npm).
#   make demo        a video from a sentence, by the model in the box, in demo.mp4
#   make test        every quick test, two files at a time
#   make test-slow   training runs, several processes, real art, the docs' commands
#   make check       style and types
#   make data        the real art, and the emoji world made from it, in data/

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

DEMO_PROMPT ?= a panda growing on a green background

.PHONY: demo test test-slow check data clean

demo: .venv/.demo
	@echo 'Making demo.mp4: "$(DEMO_PROMPT)", in less than a minute.'
	@$(BIN)/nova generate "$(DEMO_PROMPT)" --output demo.mp4 --seed 0
	@echo 'This small model knows 285 emoji in motion: $(BIN)/nova words. Free text takes a released checkpoint and a GPU:'
	@echo '$(BIN)/nova generate "a red panda in the snow" --model BAAI/nova-d48w1024-osp480 --num-frames 33'

test: .venv/.dev
	$(BIN)/python -m pytest tests --numprocesses 2 --dist loadfile

test-slow: .venv/.dev
	-command -v npm > /dev/null && $(MAKE) data # tests of the real art are skipped without it
	$(BIN)/python -m pytest tests -m slow

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

data: data/emoji

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache demo.mp4

# The environment: one stamp for what a user needs, one for what a developer needs on top.
.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/python
	@echo 'Installing PyTorch and what else the model needs into .venv: some minutes and 2 GB.'
	$(PIP) --editable '.[demo]'
	touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --quiet --editable '.[train,data,eval,demo,docs,lowmem,dev]'
	touch $@ .venv/.demo

# The art (MIT) is fetched by package name and never committed.
data/downloads/art/package: PACKAGE := @lobehub/fluent-emoji-3d@1.1.0
data/downloads/names/package: PACKAGE := emojibase-data@17.0.0
data/downloads/%/package:
	mkdir -p $(@D)
	npm pack --silent --pack-destination $(@D) $(PACKAGE)
	tar -xzf $(@D)/*.tgz -C $(@D)

data/emoji: | .venv/.dev data/downloads/art/package data/downloads/names/package
	$(BIN)/nova data emoji --art data/downloads/art/package --names data/downloads/names/package/en/data.json --output $@
