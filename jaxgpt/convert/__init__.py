"""Other people's models in and out: Hugging Face directories, GGUF files, llama2.c files."""
