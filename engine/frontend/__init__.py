"""Requests as people make them and answers as they get them: prompts, parameters, text."""
