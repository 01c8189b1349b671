"""From a model folder and prompts to pictures."""
