"""The Res2Net module, and a file for each family of backbones built from it."""
