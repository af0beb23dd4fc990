"""Files that `export` lays beside a model in a container: they import nnU-Net alone and run without this package."""
