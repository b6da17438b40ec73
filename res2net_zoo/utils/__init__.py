"""What any program needs, and nothing about models: errors, files, processes, the console, the Hub's client."""
