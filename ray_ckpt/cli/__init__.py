"""The command line: words and tables for people, `--json` for scripts."""
