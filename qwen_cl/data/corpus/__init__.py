"""Raw text of any usual form, tokenised once into Megatron's indexed format, and sequences cut from it."""
