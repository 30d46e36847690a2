# make test   new machine -> .venv -> lint, types, tests        make rewards   render and score a few clips
# make demo   trains the embedded model for MINUTES (6) from a new SEED, then judges it on held-out prompts; runs/demo-SEED
# make lint   ruff + mypy                                       make bench  the hot paths, timed
# make test-slow   the shipped models' numbers, measured again
# make assets   trains every shipped model from nothing, in some seven hours on one CPU core; `RESUME=1` goes on after a stop
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

BOOTSTRAP = $(BIN)/python -m vggrpo bootstrap
RECIPES := launch/recipes/bootstrap
NEW := runs/assets
ifndef SEED
SEED := $(shell date +%s)
endif
MINUTES ?= 6
DEMO := runs/demo-$(SEED)

.PHONY: test test-slow lint format demo rewards bench assets clean

test: lint
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(INSTALLED)
	$(BIN)/python -m vggrpo train launch/recipes/tiny.yaml grpo.seed=$(SEED) max_minutes=$(MINUTES) out=$(DEMO)/train
	$(BIN)/python -m vggrpo evaluate --lora vggrpo=$(DEMO)/train --best-of 4 --seed $(SEED) \
		--guidance-scale 1 --guidance-geometry 1000 \
		--out $(DEMO)/report --animate $(DEMO)/before_after.gif
	@echo "look at $(DEMO)/before_after.gif and $(DEMO)/report/report.html"

rewards: $(INSTALLED)
	$(BIN)/python -m benchmarks.demo --out runs/rewards

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.world
	$(BIN)/python -m benchmarks.rewards
	$(BIN)/python -m benchmarks.reward_path

# In the order in which one needs the other: the referee sees through the VAE, and judges the generator.
assets: $(INSTALLED)
	test -n "$(RESUME)" || test ! -e $(NEW) || { echo "$(NEW) holds a build: RESUME=1 goes on, or delete it"; exit 1; }
	$(BOOTSTRAP) text $(RECIPES)/text.yaml out=$(NEW)/text
	$(BOOTSTRAP) vae $(RECIPES)/vae.yaml out=$(NEW)/vae
	$(BOOTSTRAP) geometry $(RECIPES)/geometry.yaml out=$(NEW)/geometry
	$(BOOTSTRAP) geometry $(RECIPES)/geometry_clip.yaml out=$(NEW)/geometry_clip
	$(BOOTSTRAP) geometry $(RECIPES)/geometry_adjusted.yaml out=$(NEW)/geometry_adjusted
	$(BOOTSTRAP) geometry $(RECIPES)/geometry_adjusted.yaml out=$(NEW)/geometry_adjusted_more first_clip=1013000
	$(BOOTSTRAP) referee $(RECIPES)/referee.yaml out=$(NEW)/referee
	$(BOOTSTRAP) generator $(RECIPES)/generator.yaml training.out=$(NEW)/generator
	$(BOOTSTRAP) generator $(RECIPES)/generator_hand_held.yaml training.out=$(NEW)/generator_hand_held
	$(BIN)/python -m vggrpo stitch launch/recipes/stitch/tiny.yaml out=$(NEW)/stitch
	$(BOOTSTRAP) eval

# Torch comes first and pinned, so that no other package's range picks its version and build.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,eval,viz,deepspeed,dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
