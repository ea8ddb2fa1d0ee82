"""Tables, words and chart parts that several pages use."""
