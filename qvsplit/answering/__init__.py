"""Requests to answers: the engine behind its door, checks, schemas, the recorder."""
