"""What pyproject.toml cannot say: `training/` stays out of wheels, and so does what an earlier build left behind."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Copies the packages into a `build/lib` that holds nothing else; `edgemuse.training` only in editable installs."""

    def finalize_options(self) -> None:
        """Drop the package from what is copied."""
        super().finalize_options()
        if not self.editable_mode:
            self.packages = [name for name in self.packages if name != "edgemuse.training"]

    def run(self) -> None:
        """A module that was deleted or moved since the last build would otherwise be in the next wheel again."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "edgemuse"), ignore_errors=True)
        super().run()


setup(cmdclass={"build_py": BuildPy})
