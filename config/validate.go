package config

// cross returns what is wrong between fields of a set with every default filled in.
func cross(s Set) []Problem { return nil }
