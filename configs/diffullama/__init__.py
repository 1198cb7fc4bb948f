"""DiffuLLaMA's configurations: one primary file per entry point, and its groups."""
