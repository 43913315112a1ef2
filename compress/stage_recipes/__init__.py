"""What a recipe may say of each kind of stage: one frozen class per file."""
