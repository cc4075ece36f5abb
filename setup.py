"""What pyproject.toml cannot say: `training/` is for work on the project and stays out of wheels."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Leaves `edgemuse.training` out unless the install is editable."""

    def finalize_options(self) -> None:
        """Drop the package from what is copied."""
        super().finalize_options()
        if not self.editable_mode:
            self.packages = [name for name in self.packages if name != "edgemuse.training"]


setup(cmdclass={"build_py": BuildPy})
