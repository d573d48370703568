"""Packaging: everything is said once, in settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
lib = cfg["lib_name"]


class WithTemplates(build_py):
    "The analysis notebooks, which reports are made of, go into the package that is installed."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        templates = Path(self.build_lib, lib, "analysis")
        templates.mkdir(parents=True, exist_ok=True)
        for notebook in Path("nbs/analysis").glob("*.ipynb"):
            self.copy_file(str(notebook), str(templates / notebook.name))


setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="MIT",
    keywords=cfg["keywords"],
    url=cfg["git_url"],
    # installed in place by a path, which wins over a folder that has the package's name
    package_dir={"": "."},
    packages=find_packages(include=[lib, lib + ".*"]),
    package_data={lib: ["data/*"]},
    cmdclass={"build_py": WithTemplates},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={
        extra: cfg[f"{extra}_requirements"].split()
        for extra in ("dev", "jax", "peers", "pipeline", "r")
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{lib}={lib}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Bio-Informatics",
    ],
)
