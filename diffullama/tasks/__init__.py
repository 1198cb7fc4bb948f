"""The evaluation tasks: multiple choice, text answers, programs, likelihood of text, and judged samples."""
