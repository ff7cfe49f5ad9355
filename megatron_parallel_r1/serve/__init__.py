"""An OpenAI-compatible server that thinks in parallel, and a web page that shows it (docs/serving.md)."""
