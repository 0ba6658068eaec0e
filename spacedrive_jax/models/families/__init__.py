"""The families of vision-language models, one file each."""
