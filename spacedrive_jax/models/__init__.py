"""The models: SpaceDrive, its coordinate encoder and decoder, the language model, VLM families, depth."""
