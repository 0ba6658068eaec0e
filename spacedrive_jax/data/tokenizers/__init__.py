"""The project's own small tokenizer (`demo.json`) and the script that makes it."""
