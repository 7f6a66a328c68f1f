"""Speed against the usual way, both sides in one run: ``python -m bench``."""
