"""The Res2Net module, and one file per family of backbones."""
