"""The page to try, choose and design models in a browser, built with Gradio."""
