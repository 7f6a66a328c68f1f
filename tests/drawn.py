"""What a figure shows, as it is read."""

import io


def saved(figure):
    """Drawing it works, and gives a PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def shown(text):
    """What is read in the end: matplotlib takes what is between two $ for a formula."""
    plain, is_formula = text._preprocess_math(text.get_text())
    assert not is_formula
    return plain.replace("\n", "")


def legend(figure):
    return [shown(text) for text in figure.legends[0].get_texts()]
