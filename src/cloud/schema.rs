//! Turns a class type into the JSON schema that Omni checks provider data with and draws its form from.
//!
//! Omni draws one control for each top-level property, in the order they are written, and knows neither references nor unions:
//! the schema is flat, everything is inlined, a choice is an `enum`. It checks with santhosh-tekuri/jsonschema, draft 2020-12
//! where `$schema` is absent, and never fills in a default: that is left to the class's own deserialiser.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

/// The schema of a class: an object whose properties come in the order of the fields, described by their doc comments.
#[must_use]
pub fn class_schema<C: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    let mut schema = settings.into_generator().into_root_schema_for::<C>().to_value();
    simplify(&mut schema);
    sort_keywords(&mut schema);
    if let Value::Object(root) = &mut schema {
        // The name and the doc comment of the Rust type mean nothing to whoever fills in the form.
        root.shift_remove("title");
        root.shift_remove("description");
    }
    schema
}

/// Rewrites, at every level, what Omni's form cannot draw.
fn simplify(value: &mut Value) {
    match value {
        Value::Object(object) => {
            choices_to_enum(object);
            // Formats such as "uint16" and "ip" are schemars's own; nobody asserts them.
            let own = object
                .get("format")
                .and_then(Value::as_str)
                .is_some_and(|format| {
                    format == "ip" || format.starts_with("uint") || format.starts_with("int")
                });
            if own {
                object.shift_remove("format");
            }
            object.values_mut().for_each(simplify);
        }
        Value::Array(items) => items.iter_mut().for_each(simplify),
        _ => {}
    }
}

/// Keywords in the order in which a person reads them.
const KEYWORDS: [&str; 4] = ["type", "description", "default", "enum"];

/// Puts the keywords of every schema in one order, whatever the generator's: the generated file must not
/// change with it. The order of properties is the form's and stays.
fn sort_keywords(schema: &mut Value) {
    let Value::Object(object) = schema else { return };
    for (keyword, value) in object.iter_mut() {
        match (keyword.as_str(), value) {
            ("properties", Value::Object(properties)) => properties.values_mut().for_each(sort_keywords),
            ("items", items) => sort_keywords(items),
            _ => {}
        }
    }
    let mut entries: Vec<(String, Value)> = std::mem::take(object).into_iter().collect();
    entries.sort_by_key(|(keyword, _)| {
        let place = KEYWORDS
            .iter()
            .position(|known| known == keyword)
            .unwrap_or(KEYWORDS.len());
        (place, keyword.clone())
    });
    object.extend(entries);
}

/// Documented variants of an enum come as a `oneOf` of constants; Omni's form draws an `enum`.
fn choices_to_enum(object: &mut Map<String, Value>) {
    let Some(Value::Array(choices)) = object.get("oneOf") else {
        return;
    };
    let mut words = Vec::new();
    for choice in choices {
        match (choice.get("const"), choice.get("enum")) {
            (Some(word @ Value::String(_)), _) => words.push(word.clone()),
            (None, Some(Value::Array(some))) => words.extend(some.iter().cloned()),
            _ => return,
        }
    }
    object.shift_remove("oneOf");
    object.insert("type".to_owned(), Value::from("string"));
    object.insert("enum".to_owned(), Value::Array(words));
}

#[cfg(test)]
mod tests {
    use schemars::JsonSchema;
    use serde::{Deserialize, Serialize};

    use super::class_schema;

    /// Not for the form.
    #[derive(Deserialize, Serialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Class {
        /// Where to.
        zone: String,
        /// How fast.
        #[serde(default)]
        speed: Speed,
        /// How many.
        #[schemars(range(min = 1, max = 9))]
        count: u16,
        /// Servers.
        #[serde(default)]
        servers: Vec<std::net::IpAddr>,
    }

    #[derive(Deserialize, Serialize, JsonSchema, Default)]
    #[serde(rename_all = "snake_case")]
    enum Speed {
        /// Slowly.
        #[default]
        VerySlow,
        /// Quickly.
        Fast,
    }

    #[test]
    fn a_schema_is_flat_ordered_and_without_references() {
        expect_test::expect![[r#"
            {
              "type": "object",
              "additionalProperties": false,
              "properties": {
                "zone": {
                  "type": "string",
                  "description": "Where to."
                },
                "speed": {
                  "type": "string",
                  "description": "How fast.",
                  "default": "very_slow",
                  "enum": [
                    "very_slow",
                    "fast"
                  ]
                },
                "count": {
                  "type": "integer",
                  "description": "How many.",
                  "maximum": 9,
                  "minimum": 1
                },
                "servers": {
                  "type": "array",
                  "description": "Servers.",
                  "default": [],
                  "items": {
                    "type": "string"
                  }
                }
              },
              "required": [
                "zone",
                "count"
              ]
            }"#]]
        .assert_eq(&serde_json::to_string_pretty(&class_schema::<Class>()).unwrap());
    }
}
