"""Prompts to answers, by the teacher or the student: docs/generate.md."""
