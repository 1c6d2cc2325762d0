"""Names of files, prefixes and entry points that several rooms must agree on."""

HUB_PREFIX = "hf-hub:"  # timm's, before the id of a repository
VARIANT_PREFIX = "nats_"  # of the variants' names
NATS_ANY = "nats_any"  # the entry point for every other timm network

CONFIG_NAME = "config.json"  # beside the weights; states what network they are of
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"
CHART_NAME = "genotype.png"
MODEL_FILES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, "*.png")

GENOTYPE_NAME = "genotype.json"  # what a search writes into its folder, too
RUN_NAME, LOG_NAME = "run.json", "log.jsonl"  # a run's settings and its log, in its folder
