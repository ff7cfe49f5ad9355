"""What a person sees of a run: metrics on disk, live progress, the evaluation table, `report.html`.
It reads and writes the files of a run folder and knows no model and no engine."""
