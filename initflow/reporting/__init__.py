"""Numbers, words and pictures of results: statistics, sentences, figures and the report page.

Values in; text, tables and matplotlib figures out. Nothing is trained, read from MLflow or printed
here.
"""
