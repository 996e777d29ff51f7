"""Send load to an OpenAI-compatible server and record every request. Runs in an experiment's process."""
