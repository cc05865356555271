"""Looking inside a trained model: its layers as matrices over tokens, and what these say about the text."""
