"""Reader of Bench2Drive's data: clips of annotations and pictures, in folders or tar files."""
