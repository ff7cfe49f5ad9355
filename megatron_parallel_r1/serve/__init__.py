"""An OpenAI-compatible server that thinks in parallel, and a page to watch it (docs/serving.md)."""
