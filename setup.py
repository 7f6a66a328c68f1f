"""What a wheel holds beside the package's own files: copies of what lies beside it in the checkout.

All else is in pyproject.toml. An editable install copies nothing: it uses the checkout's.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = [  # where initflow.core.paths.shipped looks for them
    "MLproject",
    "conda.yaml",
    "pyproject.toml",
    "requirements.lock",
    *(
        f"plugins/initflow-{name}/{file}"
        for name in ("critical", "looks-linear", "lsuv")
        for file in ("README.md", "pyproject.toml", f"src/initflow_{name.replace('-', '_')}.py")
    ),
]


class Build(build_py):
    """Copies them into ``initflow/shipped``."""

    def run(self) -> None:
        super().run()
        for file in () if self.editable_mode else SHIPPED:
            target = Path(self.build_lib, "initflow", "shipped", file)
            self.mkpath(str(target.parent))
            self.copy_file(file, str(target))


setup(cmdclass={"build_py": Build})
