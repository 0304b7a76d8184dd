"""What a trained model is handed on as: its weights, and programs that need none of the objective's code.

In come a model and some rows. Out go the bytes of a file, read back and compared with the model, or a `FormatError`
that says why a format cannot hold this model. Nothing here knows of a study: a search asks before its first trial what
an export will ask in the end.
"""
