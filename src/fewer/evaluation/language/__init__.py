"""What a language model still knows of a text when less of the text is kept: tasks, and the bench that runs them."""
