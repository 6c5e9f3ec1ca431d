# Every target sets up what it needs in .venv and needs nothing but Python (data also npm).
#   make demo           make a video from a sentence by the bundled model, in demo.mp4
#   make serve          serve the bundled model and its page on http://127.0.0.1:8000
#   make soak           let many clients, kills and disconnects try a server, and record what was seen
#   make check          check style, types, plain English and the order of packages
#   make test           run every quick test, two files at a time
#   make test-plain     run the quick tests on a copy of the package without its fast parts
#   make test-slow      run training, several processes, real art and the commands of the docs
#   make data           fetch the real art, and make the emoji world from it, in data/
#   make docs           build the documentation site in site/, and check the links in it
#   make page-images    draw the pictures of the page again, in docs/images, by its tests
#   make drawing        draw the packages and their imports again, in docs/images
#   make build          build the wheel and the source archive in dist/
#   make check-wheel    install that wheel into a fresh environment and make a picture with it
#   make release-notes  print what the changelog says about VERSION (by default this one)
#   make clean          remove what these targets made, but for data/

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

DEMO_PROMPT ?= a panda growing on a green background

VERSION ?= $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/nova_video/__init__.py)

.PHONY: demo serve soak test test-plain test-slow check data docs drawing page-images build check-wheel release-notes clean

demo: .venv/.demo
	@echo 'Making demo.mp4: "$(DEMO_PROMPT)", in less than a minute.'
	@$(BIN)/nova generate "$(DEMO_PROMPT)" --output demo.mp4 --seed 0
	@echo 'This small model knows 285 emoji in motion: $(BIN)/nova words. Free text takes a released checkpoint and a GPU:'
	@echo '$(BIN)/nova generate "a red panda in the snow" --model BAAI/nova-d48w1024-osp480 --num-frames 33'

serve: .venv/.serve
	@$(BIN)/nova serve

soak: .venv/.dev
	$(BIN)/python benchmarks/soak.py

test: .venv/.dev
	$(BIN)/python -m pytest tests --numprocesses 2 --dist loadfile

test-plain: .venv/.dev
	plain=$$(mktemp -d); trap 'rm -rf "$$plain"' EXIT; cp -R src/. "$$plain"; rm -R "$$plain/nova_video/fast"; \
	PYTHONPATH="$$plain" $(BIN)/python -m pytest tests --ignore tests/fast --numprocesses 2 --dist loadfile

test-slow: .venv/.dev
	-command -v npm > /dev/null && $(MAKE) data # tests of the real art are skipped without it
	$(BIN)/python -m pytest tests -m slow

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/plain_english.py

docs: .venv/.site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'Links to other servers, which are not followed:'
	@grep -ohE 'https?://[^] )>"`]+' *.md docs/*.md benchmarks/README.md | sort -u
	@echo 'The site is there: site/index.html'

drawing: .venv/.dev
	cd docs && ../$(BIN)/python -m drawing.packages images/packages.svg

page-images: .venv/.dev
	NOVA_PAGE_IMAGES=1 $(BIN)/python -m pytest tests/slow/test_page.py -m slow

build: .venv/.release
	rm -f dist/*.whl dist/*.tar.gz
	$(BIN)/python -m build --outdir dist .

check-wheel:
	tools/check_wheel.sh $(PYTHON)

release-notes:
	@mkdir -p dist
	@$(PYTHON) tools/release_notes.py $(VERSION) > dist/RELEASE_NOTES.md && cat dist/RELEASE_NOTES.md

data: data/emoji

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache demo.mp4 dist site

# The environment: one stamp for what a user needs, one for what a developer needs on top.
.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/python
	@echo 'Installing PyTorch and what else the model needs into .venv: some minutes and 2 GB.'
	$(PIP) --editable '.[demo]'
	touch $@

.venv/.serve: pyproject.toml constraints.txt | .venv/bin/python
	@echo 'Installing PyTorch and what else the server needs into .venv: some minutes and 2 GB.'
	$(PIP) --editable '.[demo,serve]'
	touch $@ .venv/.demo

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --quiet --editable '.[train,data,eval,demo,docs,lowmem,serve,ray,page,dev]'
	touch $@ .venv/.demo .venv/.serve

.venv/.site: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --quiet --editable '.[site]'
	touch $@

.venv/.release: constraints.txt | .venv/bin/python
	$(PIP) --quiet build
	touch $@

# The art (MIT) is fetched by package name and never committed.
data/downloads/art/package: PACKAGE := @lobehub/fluent-emoji-3d@1.1.0
data/downloads/names/package: PACKAGE := emojibase-data@17.0.0
data/downloads/%/package:
	mkdir -p $(@D)
	npm pack --silent --pack-destination $(@D) $(PACKAGE)
	tar -xzf $(@D)/*.tgz -C $(@D)

data/emoji: | .venv/.dev data/downloads/art/package data/downloads/names/package
	$(BIN)/nova data emoji --art data/downloads/art/package --names data/downloads/names/package/en/data.json --output $@
