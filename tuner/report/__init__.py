"""What a study came to, on one page that needs no network: its facts, figures drawn of them, and the file.

In comes a study, finished or not, whichever program created it, and the manifest of an export where there is one.
Out go the facts, which are values and JSON, and an HTML page of them; nothing is trained, and torch is not imported.
"""
