"""Utilities that do not depend on models: errors, files, processes, the console, access to the Hub."""
