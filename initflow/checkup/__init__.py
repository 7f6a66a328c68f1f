"""What initflow finds where it runs, and what of it is broken: for people, and to report.

Nothing is made, sent or repaired by looking. Each module looks at one thing, and is imported only
then, so that a package that is missing costs no more than what needs it.
"""
