"""Topics of support tickets and drafts of replies, each a batch asset in a few lines of YAML."""
