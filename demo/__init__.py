"""The Gradio app behind `fastdiff demo`: one file a tab, one file an idea."""
